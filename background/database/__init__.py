"""Where rows live: the tables, the connections, and the differences of the two databases."""
