package main

import "golang.org/x/net/websocket"

// xnet is golang.org/x/net/websocket. It makes no fragments, and shows no close code.
type xnet struct{ conn *websocket.Conn }

// connect has the Origin of the library's own example, with a slash at its end.
func (x *xnet) connect(url string) error {
	config, err := websocket.NewConfig(url, "http://localhost/")
	if err != nil {
		return err
	}
	config.Protocol = []string{subprotocol}
	x.conn, err = websocket.DialConfig(config)
	return err
}

func (x *xnet) send(text string) error {
	return websocket.Message.Send(x.conn, text)
}

func (x *xnet) receive() (text string, err error) {
	err = websocket.Message.Receive(x.conn, &text)
	return text, err
}

func (x *xnet) close() (int, error) {
	return 0, x.conn.Close()
}
