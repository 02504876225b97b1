"""From a prompt and its images to text."""
