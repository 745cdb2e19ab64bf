"""Callbacks that watch a run, and write what it leaves behind."""
