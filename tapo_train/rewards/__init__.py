"""What a trajectory is worth: answer correctness and format, parts kept."""
