"""An invented world from one seed: pictures, corpus, image index and questions."""
