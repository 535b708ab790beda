"""A worker is killed: in a task, idle, while it receives, and while a child of its own lives on."""
