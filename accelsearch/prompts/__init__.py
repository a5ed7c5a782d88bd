"""Built-in prompt lists: UTF-8 text files, one prompt a line."""
