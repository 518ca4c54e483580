"""How fast whole models run, next to the same models in 16 bit: what `qoqc bench` measures."""
