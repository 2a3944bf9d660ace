"""What a run tells: metrics and where they go, the run folder, dumps, statistics, plots."""
