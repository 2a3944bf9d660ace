"""What only the demo needs: an invented search world and a tiny policy that can learn it."""
