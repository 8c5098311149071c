"""From a model to a smaller model: pipeline.py is the table of contents; read it first."""
