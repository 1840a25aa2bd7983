"""The Generate tab: the form, the rack of adapters, the stage, and getting an old picture's settings back."""
