"""For authors of descriptors: what is wrong with one (``review``), and a first draft of one (``draft``). Headers and config.json alone."""
