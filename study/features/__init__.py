"""What the backbone sees in each image: computed once, cached, standardised."""
