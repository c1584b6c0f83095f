"""Entry points, and one folder a question with its recorded results."""
