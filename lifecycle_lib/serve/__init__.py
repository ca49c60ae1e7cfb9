"""Floor 3, serving: a frozen checkpoint answers from what it is shown. Nothing here changes a weight."""
