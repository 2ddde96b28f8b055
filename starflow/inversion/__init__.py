"""Inversion of a flow: requests, measured solvers and reports."""
