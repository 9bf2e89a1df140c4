package main

import (
	"context"

	"github.com/coder/websocket"
)

// coder is github.com/coder/websocket, formerly nhooyr.io/websocket.
type coder struct{ conn *websocket.Conn }

func (c *coder) connect(url string) (err error) {
	options := websocket.DialOptions{
		Subprotocols:    []string{subprotocol},
		CompressionMode: websocket.CompressionContextTakeover,
	}
	c.conn, _, err = websocket.Dial(context.Background(), url, &options)
	if err == nil {
		c.conn.SetReadLimit(-1) // 32 kB unless set
	}
	return err
}

func (c *coder) send(text string) error {
	return c.conn.Write(context.Background(), websocket.MessageText, []byte(text))
}

func (c *coder) sendFragments(parts []string) error {
	writer, err := c.conn.Writer(context.Background(), websocket.MessageText)
	if err != nil {
		return err
	}
	for _, part := range parts {
		if _, err := writer.Write([]byte(part)); err != nil {
			return err
		}
	}
	return writer.Close()
}

func (c *coder) receive() (string, error) {
	_, payload, err := c.conn.Read(context.Background())
	return string(payload), err
}

// close relies on the library's Close: it returns nil only if the broker answered with the same code.
func (c *coder) close() (int, error) {
	if err := c.conn.Close(websocket.StatusNormalClosure, ""); err != nil {
		return 0, err
	}
	return int(websocket.StatusNormalClosure), nil
}
