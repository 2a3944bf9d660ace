"""Engines in other processes: a server around any engine, and the engine that asks servers."""
