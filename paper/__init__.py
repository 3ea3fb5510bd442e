"""The paper's tables and figures, and what it leaves open; nothing else imports this."""
