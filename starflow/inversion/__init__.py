"""Inverting a flow: what is asked for, which solver serves it, and reports."""
