"""One file per kernel family: template, launcher, tile candidates."""
