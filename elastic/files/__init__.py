"""What a run leaves: files of networks, and their export."""
