"""The steps from one schema of the conversation log to the next. A step that landed is never changed."""
