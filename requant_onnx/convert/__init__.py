"""The conversion of a model into a smaller model.  pipeline.py is the table of contents; read it first."""
