"""The exported model: chosen, written in every format, verified and described."""
