"""The files that every exported folder contains; they import transformers and torch alone."""
