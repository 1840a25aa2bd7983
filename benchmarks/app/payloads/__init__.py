"""What hostile pages, clients and files send to the app, and what it must come to."""
