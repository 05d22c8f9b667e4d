"""What people and programs outside talk to: HTTP stays in this room."""
