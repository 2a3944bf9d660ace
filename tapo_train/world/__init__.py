"""An invented world of houses and emblems: pictures, corpus, image index and questions from one seed."""
