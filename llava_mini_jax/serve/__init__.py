"""An engine behind HTTP: an OpenAI-compatible server with one page."""
