"""The backbone's features of each image: computed once, cached, standardised."""
