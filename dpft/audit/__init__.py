"""Measuring from outside how much a training leaks: what an audit proves is a lower bound on ε, never an upper one."""
