"""Ways to train sparse: lottery tickets, penalties, teachers, sensitivity."""
