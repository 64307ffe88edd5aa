"""What people see: reports, their pictures, pages and files."""
