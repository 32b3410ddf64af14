"""Labels by people: a page on which they rank outputs or write demonstrations, its database, and what leaves it."""
