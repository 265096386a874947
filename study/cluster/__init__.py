"""Machines and Ray sessions: this machine or a cluster."""
