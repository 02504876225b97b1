"""The network. Read `llava_mini.py` first: it is the whole flow; the other files are its stations."""
