"""Rollout: tasks → groups of multi-turn, tool-using trajectories."""
