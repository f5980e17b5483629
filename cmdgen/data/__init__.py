"""Clips to learn from: the rendered world and folders of video files."""
