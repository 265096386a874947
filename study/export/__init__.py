"""Export of the best model: selection, file formats, verification and model card."""
