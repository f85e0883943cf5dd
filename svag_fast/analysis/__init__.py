"""What run folders say: runs, verdict, prediction, report. No torch is imported here."""
