"""Two models judged: on images, weight by weight, and many recipes against each other."""
