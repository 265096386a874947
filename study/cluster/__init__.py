"""This machine or a Ray cluster: what there is, and a Ray to run on."""
