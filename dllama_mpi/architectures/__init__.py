"""One file a family of models: its config.json and its tensor names."""
