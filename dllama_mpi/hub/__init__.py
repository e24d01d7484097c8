"""Models by name: the table that comes with the program, and repositories of the Hugging Face hub."""
