"""What a record is, how files and published layouts are read, prompt templates, and text to token ids."""
