"""Where training and evaluation rows come from: tasks, plain text, and their collator."""
