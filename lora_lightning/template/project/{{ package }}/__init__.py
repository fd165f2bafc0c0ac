"""What is this project's own: a backbone, a task and a DataModule, which configs name by their class path."""
