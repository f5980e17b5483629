"""The rendered world: captioned clips of emoji subjects that move in scrolling scenes."""
