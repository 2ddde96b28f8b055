"""Flows of this project inside other libraries. A module here imports the library that it is named after."""
