"""The network: backbone, head, and the pretrained weights."""
