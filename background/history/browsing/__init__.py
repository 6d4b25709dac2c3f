"""Parts of the history of messages: the search by a filter, the errors in groups, and the topics."""
