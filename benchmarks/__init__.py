"""How fast and how lean every part is, against its peers and against the limits of the machine: see README.md here."""
