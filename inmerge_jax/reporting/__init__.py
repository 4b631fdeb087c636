"""Tables (`tables`), figures (`plots`) and the HTML report (`html_report`) of a finished run."""
